with

genuine_orders as (

    select * from {{ ref('fct_orders') }}
    where not is_fraud

),

products as (

    select * from {{ ref('dim_products') }}

),

costs as (

    select
        product_id,
        cost,
        -- Before the first state that was seen, its cost is the best that is known; while a product was gone, its last one.
        if(
            row_number() over (partition by product_id order by dbt_valid_from) = 1,
            timestamp '0001-01-01',
            dbt_valid_from
        ) as known_from,
        lead(dbt_valid_from) over (partition by product_id order by dbt_valid_from) as known_to
    from {{ ref('products_history') }}

),

sales as (

    select
        genuine_orders.product_id,
        sum({{ wide('genuine_orders.quantity') }}) as units_sold,
        sum({{ wide('genuine_orders.amount_numeric') }}) as revenue,
        sum({{ wide('genuine_orders.quantity') }} * costs.cost) as cost
    from genuine_orders
    left join costs
        on
            genuine_orders.product_id = costs.product_id
            and genuine_orders.created_date >= costs.known_from
            and (genuine_orders.created_date < costs.known_to or costs.known_to is null)
    group by genuine_orders.product_id

),

final as (

    select
        sales.product_id,
        products.product_name,
        products.category,
        sales.units_sold,
        sales.revenue,
        sales.cost,
        sales.revenue - sales.cost as profit,
        safe_divide(cast(sales.revenue - sales.cost as float64), cast(sales.revenue as float64)) as margin
    from sales
    left join products on sales.product_id = products.product_id

)

select * from final
