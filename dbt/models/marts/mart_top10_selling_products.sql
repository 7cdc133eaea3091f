with

genuine_orders as (

    select * from {{ ref('fct_orders') }}
    where not is_fraud

),

products as (

    select * from {{ ref('dim_products') }}

),

sales as (

    select
        product_id,
        sum(quantity) as units_sold,
        sum(amount_numeric) as revenue
    from genuine_orders
    group by product_id

),

top_10 as (

    select
        row_number() over (order by units_sold desc, product_id) as product_rank,
        *
    from sales
    qualify product_rank <= 10

),

final as (

    select
        top_10.product_rank,
        top_10.product_id,
        products.product_name,
        top_10.units_sold,
        top_10.revenue
    from top_10
    left join products on top_10.product_id = products.product_id

)

select * from final
