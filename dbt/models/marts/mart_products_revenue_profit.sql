with

orders as (

    select * from {{ ref('orders_by_product') }}
    where created_day is null

),

products as (

    select * from {{ ref('dim_products') }}

),

costs as (

    select * from {{ ref('product_costs') }}

),

sales as (

    select
        orders.product_id,
        sum(orders.units_sold) as units_sold,
        sum(orders.revenue) as revenue,
        sum(orders.units_sold * costs.cost) as cost
    from orders
    left join costs
        on
            orders.product_id = costs.product_id
            and orders.cost_from = costs.known_from
    where orders.total_orders > orders.fraud_orders
    group by orders.product_id

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
