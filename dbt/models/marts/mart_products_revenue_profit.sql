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

with_cost as (

    select
        sales.product_id,
        products.product_name,
        products.category,
        sales.units_sold,
        sales.revenue,
        sales.units_sold * products.cost as cost
    from sales
    left join products on sales.product_id = products.product_id

),

final as (

    select
        *,
        revenue - cost as profit,
        safe_divide(revenue - cost, revenue) as margin
    from with_cost

)

select * from final
